package sqlite

import "testing"

func TestNetwork(t *testing.T) {
	for magic, want := range map[uint32]string{
		0x6969: "NFS", 0xff534d42: "SMB", 0xfe534d42: "SMB", 0x517b: "SMB",
		0xef53: "", 0x58465342: "", 0x9123683e: "", 0x01021994: "", 0x794c7630: "", // ext4, xfs, btrfs, tmpfs, overlayfs
	} {
		if got := network(magic); got != want {
			t.Errorf("%x: %q, want %q", magic, got, want)
		}
	}
	if kind, err := remote(t.TempDir()); kind != "" || err != nil {
		t.Errorf("here: %q, %v", kind, err)
	}
	if _, err := remote(t.TempDir() + "/none"); err == nil {
		t.Error("there is no such directory")
	}
}
