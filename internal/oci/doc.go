// Package oci holds the nouns of the OCI distribution protocol: names,
// references, digests, media types, manifests, error bodies, byte ranges and
// pagination links. It knows the grammar and nothing of storage or policy.
//
// Sources are named where a rule comes from the distribution specification
// ("spec") or from what real clients do.
package oci
