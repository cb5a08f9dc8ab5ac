package oci

import (
	"encoding/json"
	"math"
	"net/http"
	"strconv"
	"time"
)

// Error codes of the spec ("Error codes"), and the three of distribution's
// that clients know.
const (
	CodeBlobUnknown         = "BLOB_UNKNOWN"
	CodeBlobUploadInvalid   = "BLOB_UPLOAD_INVALID"
	CodeBlobUploadUnknown   = "BLOB_UPLOAD_UNKNOWN"
	CodeDenied              = "DENIED"
	CodeDigestInvalid       = "DIGEST_INVALID"
	CodeManifestBlobUnknown = "MANIFEST_BLOB_UNKNOWN"
	CodeManifestInvalid     = "MANIFEST_INVALID"
	CodeManifestUnknown     = "MANIFEST_UNKNOWN"
	CodeNameInvalid         = "NAME_INVALID"
	CodeNameUnknown         = "NAME_UNKNOWN"
	CodePageInvalid         = "PAGINATION_NUMBER_INVALID"
	CodeRangeInvalid        = "RANGE_INVALID"
	CodeSizeInvalid         = "SIZE_INVALID"
	CodeTagInvalid          = "TAG_INVALID"
	CodeTooManyRequests     = "TOOMANYREQUESTS"
	CodeUnavailable         = "UNAVAILABLE"
	CodeUnsupported         = "UNSUPPORTED"
)

// An Error is an answer that is not content: an HTTP status and an OCI error
// code, with a sentence for the person who reads it in their terminal.
type Error struct {
	Status  int
	Code    string
	Message string
	// Detail is optional, for programs.
	Detail any
	// RetryAfter is when asking again makes sense; zero says nothing.
	RetryAfter time.Duration
}

func (e *Error) Error() string { return e.Code + ": " + e.Message }

// Write sends the error as the spec's JSON body. dockerd reads the body only
// if its type is exactly application/json.
func (e *Error) Write(w http.ResponseWriter, r *http.Request) {
	type item struct {
		Code    string `json:"code"`
		Message string `json:"message"`
		Detail  any    `json:"detail,omitempty"`
	}
	body, err := json.Marshal(map[string][]item{"errors": {{e.Code, e.Message, e.Detail}}})
	if err != nil { // a Detail that cannot be encoded
		body, _ = json.Marshal(map[string][]item{"errors": {{e.Code, e.Message, nil}}})
	}
	header := w.Header()
	header.Set("Content-Type", "application/json")
	header.Set("Content-Length", strconv.Itoa(len(body)))
	header.Set("Cache-Control", "no-store")
	header.Del("ETag")
	if e.RetryAfter > 0 {
		header.Set("Retry-After", strconv.Itoa(int(math.Ceil(e.RetryAfter.Seconds()))))
	}
	w.WriteHeader(e.Status)
	if r.Method != http.MethodHead {
		w.Write(body)
	}
}
