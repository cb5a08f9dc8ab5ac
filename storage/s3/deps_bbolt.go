package s3

import _ "go.etcd.io/bbolt" // the index
