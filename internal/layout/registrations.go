package layout

import "strings"

// IsImageRegistration reports whether a key is one that ImageRegistration makes.
func IsImageRegistration(key string) bool {
	parts := strings.Split(strings.TrimPrefix(key, Images), "/")
	return strings.HasPrefix(key, Images) && len(parts) == 4 && parts[1] == "registrations" && strings.HasSuffix(key, ".json")
}
