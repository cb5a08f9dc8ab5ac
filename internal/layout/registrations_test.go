package layout

import "testing"

func TestRegistrations(t *testing.T) {
	key := Registration("ubuntu", "v1", "default")
	if key != "mirror/records/backing-images/ubuntu/registrations/v1/default.json" || !IsRegistration(key) {
		t.Error(key)
	}
	for _, other := range []string{"", BackingImages + "ubuntu/image.json", BackingImages + "ubuntu/versions/v1.json",
		BackingImages + "ubuntu/registrations/v1/default", "x/" + key, key + "/x.json"} {
		if IsRegistration(other) {
			t.Errorf("%s is none", other)
		}
	}
}
