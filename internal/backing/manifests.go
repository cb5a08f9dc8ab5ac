package backing

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"strings"

	"go.yaml.in/yaml/v3"
)

// mib is what sizes of volumes are rounded up to.
const mib = 1 << 20

// object is what every Kubernetes object begins with.
type object struct {
	APIVersion string   `yaml:"apiVersion"`
	Kind       string   `yaml:"kind"`
	Metadata   metadata `yaml:"metadata"`
}

type metadata struct {
	Name      string `yaml:"name"`
	Namespace string `yaml:"namespace,omitempty"`
}

// Manifest is YAML that can be applied as it is: storageclass, backingimage, datavolume.
// Of a version that is registered with the cluster it names what Longhorn has; an
// empty cluster is the only one.
func (l *Library) Manifest(ctx context.Context, name, reference, kind, cluster string) ([]byte, error) {
	v, err := l.Version(ctx, name, reference)
	if err != nil {
		return nil, err
	}
	return l.registrar.manifest(ctx, v, kind, cluster)
}

func (r *registrar) manifest(ctx context.Context, v Version, kind, cluster string) ([]byte, error) {
	if v.State != Ready {
		return nil, fail(Busy, "%s %s is not ready yet: it is %s", v.Name, v.Version, v.State)
	}
	record, err := r.standing(ctx, v, cluster)
	if err != nil {
		return nil, err
	}
	switch kind {
	case "storageclass":
		return storageClass(v, record)
	case "backingimage":
		return backingImage(v, record)
	case "datavolume":
		return dataVolume(v, record)
	}
	return nil, fail(NotFound, "there are the manifests storageclass, backingimage and datavolume, and not %.50q", kind)
}

// standing is a version's registration, or what it would be.
func (r *registrar) standing(ctx context.Context, v Version, cluster string) (registration, error) {
	if err := r.load(ctx); err != nil {
		return registration{}, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if cluster != "" && r.clusters[cluster] == nil {
		return registration{}, fail(NotFound, "there is no Longhorn %.100q in the configuration", cluster)
	}
	if len(r.clusters) == 1 {
		for name := range r.clusters {
			cluster = name
		}
	}
	if held := r.held[place{v.Name, v.Version, cluster}]; held != nil {
		record := held.record
		if record.URL == "" && !r.settings.Private && checkPublic(r.settings.PublicURL) == nil {
			record.URL = address(r.settings.PublicURL, v, "")
		}
		return record, nil
	}
	record := registration{Name: longhornNameOf(v.Name, v.Digests.SHA512), Mode: Download, SHA512: v.Digests.SHA512}
	if r.settings.Private {
		return record, fail(Malformed, "not everybody may read %s, and Longhorn has no token for it yet: register it with the mode download, or say with which cluster", v.Name)
	}
	if err := checkPublic(r.settings.PublicURL); err != nil {
		return record, err
	}
	record.URL = address(r.settings.PublicURL, v, "")
	return record, nil
}

// storageClass makes volumes that begin with an image. Longhorn's driver makes an image
// that is missing, and for one that is there compares type and parameters if they are
// given (csi/controller_server.go): the address must be the very same string.
func storageClass(v Version, record registration) ([]byte, error) {
	parameters := map[string]string{
		"numberOfReplicas": "3", "staleReplicaTimeout": "2880",
		"backingImage": record.Name, "backingImageChecksum": record.SHA512.Encoded(),
	}
	about := "Volumes need " + mebibytes(v.VirtualSize) + " or more."
	if record.Mode == Download && !record.Adopted {
		source, err := json.Marshal(map[string]string{"url": record.URL})
		if err != nil {
			return nil, err
		}
		parameters["backingImageDataSourceType"], parameters["backingImageDataSourceParameters"] = "download", string(source)
	} else {
		about += "\nThe image must be in Longhorn: from this it cannot be made."
	}
	return render(about, struct {
		object               `yaml:",inline"`
		Provisioner          string            `yaml:"provisioner"`
		AllowVolumeExpansion bool              `yaml:"allowVolumeExpansion"`
		ReclaimPolicy        string            `yaml:"reclaimPolicy"`
		VolumeBindingMode    string            `yaml:"volumeBindingMode"`
		Parameters           map[string]string `yaml:"parameters"`
	}{object{"storage.k8s.io/v1", "StorageClass", metadata{Name: "longhorn-" + record.Name}},
		"driver.longhorn.io", true, "Delete", "Immediate", parameters})
}

func backingImage(v Version, record registration) ([]byte, error) {
	if record.Mode != Download || record.Adopted {
		return nil, fail(Malformed, "%s was not fetched from here by Longhorn, and cannot be made by a manifest; register %s %s with the mode download", record.Name, v.Name, v.Version)
	}
	type spec struct {
		SourceType        string            `yaml:"sourceType"`
		SourceParameters  map[string]string `yaml:"sourceParameters"`
		Checksum          string            `yaml:"checksum"`
		MinNumberOfCopies int               `yaml:"minNumberOfCopies,omitempty"`
		NodeSelector      []string          `yaml:"nodeSelector,omitempty"`
		DiskSelector      []string          `yaml:"diskSelector,omitempty"`
	}
	return render("", struct {
		object `yaml:",inline"`
		Spec   spec `yaml:"spec"`
	}{object{"longhorn.io/v1beta2", "BackingImage", metadata{record.Name, "longhorn-system"}},
		spec{"download", map[string]string{"url": record.URL}, record.SHA512.Encoded(), record.MinNumberOfCopies, record.NodeSelector, record.DiskSelector}})
}

// dataVolume has CDI import a version into a volume of whatever storage.
func dataVolume(v Version, record registration) ([]byte, error) {
	if record.URL == "" {
		return nil, fail(Malformed, "nobody can fetch %s %s: set public_url", v.Name, v.Version)
	}
	type m = map[string]any
	return render("The field checksum is known to CDI from 1.65 on; remove it for an older one.", struct {
		object `yaml:",inline"`
		Spec   m `yaml:"spec"`
	}{object{"cdi.kubevirt.io/v1beta1", "DataVolume", metadata{Name: record.Name}},
		m{
			"source": m{"http": m{"url": record.URL, "checksum": "sha512:" + record.SHA512.Encoded()}},
			"storage": m{
				"accessModes": []string{"ReadWriteOnce"},
				"resources":   m{"requests": m{"storage": mebibytes(cmp.Or(v.VirtualSize, v.Size))}},
			},
		}})
}

// mebibytes is a size in Kubernetes' words, rounded up.
func mebibytes(size int64) string { return fmt.Sprintf("%dMi", (size+mib-1)/mib) }

func render(about string, manifest any) ([]byte, error) {
	var out bytes.Buffer
	for line := range strings.SplitSeq(about, "\n") {
		if line != "" {
			out.WriteString("# " + line + "\n")
		}
	}
	e := yaml.NewEncoder(&out)
	e.SetIndent(2)
	if err := e.Encode(manifest); err != nil {
		return nil, err
	}
	if err := e.Close(); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}
