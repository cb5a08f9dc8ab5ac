package module_test

import "os"

// childDir names, for a process that a test starts of itself, the store it is
// to use.
const childDir = "REGISTRY_TEST_CHILD_DIR"

func runChild() { os.Exit(1) }
