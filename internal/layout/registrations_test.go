package layout

import "testing"

func TestRegistrations(t *testing.T) {
	key := ImageRegistration("ubuntu", "v1", "default")
	if key != "mirror/records/backing-images/ubuntu/registrations/v1/default.json" || !IsImageRegistration(key) {
		t.Error(key)
	}
	for _, other := range []string{"", Images + "ubuntu/image.json", Images + "ubuntu/versions/v1.json",
		Images + "ubuntu/registrations/v1/default", "x/" + key, key + "/x.json"} {
		if IsImageRegistration(other) {
			t.Errorf("%s is none", other)
		}
	}
}
