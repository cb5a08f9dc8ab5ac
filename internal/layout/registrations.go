package layout

import "strings"

// BackingImages is the prefix of all records of backing images.
const BackingImages = records + "backing-images/"

// Registration is the key of the record of a version's place in a Longhorn cluster.
func Registration(image, version, cluster string) string {
	return BackingImages + image + "/registrations/" + version + "/" + cluster + ".json"
}

// IsRegistration reports whether a key is one that Registration makes.
func IsRegistration(key string) bool {
	parts := strings.Split(strings.TrimPrefix(key, BackingImages), "/")
	return strings.HasPrefix(key, BackingImages) && len(parts) == 4 && parts[1] == "registrations" && strings.HasSuffix(key, ".json")
}
