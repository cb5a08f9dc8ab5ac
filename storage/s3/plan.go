package s3

import (
	"fmt"

	"github.com/dustin/go-humanize"
)

// What S3 takes (AWS, "Amazon S3 multipart upload limits").
const (
	smallestPart  = 5 << 20 // but for the last of an object
	largestPart   = 5 << 30 // and what one PUT takes
	largestObject = 5 << 40
	mostParts     = 10_000
)

// limits are what the other end takes, and what the operator wants.
type limits struct {
	putLimit int64 // bytes up to which an object is stored in one call
	partSize int64 // least bytes of a part
	maxParts int   // of one object
}

func (s settings) limits() limits { return limits{s.PutLimit, s.PartSize, s.MaxParts} }

// partPlan is how an object of some size is stored: in parts of part bytes, the last
// of which may be smaller, or in one call if count is 0. A part is as small as the
// limits allow, and whole MiB: all but the last must be equal for some stores.
func partPlan(size int64, l limits) (part int64, count int, err error) {
	if size <= min(l.putLimit, largestPart) {
		return 0, 0, nil
	}
	if size > largestObject {
		return 0, 0, fmt.Errorf("an object of %s is beyond the %s that S3 takes", humanize.IBytes(uint64(size)), humanize.IBytes(largestObject))
	}
	most := int64(min(mostParts, l.maxParts))
	part = max(l.partSize, smallestPart, ceil(size, most))
	part = ceil(part, 1<<20) << 20
	if part > largestPart {
		return 0, 0, fmt.Errorf("an object of %s does not fit into %d parts of %s; raise max_parts if the store takes more", humanize.IBytes(uint64(size)), most, humanize.IBytes(largestPart))
	}
	return part, int(ceil(size, part)), nil
}

// ceil is a/b, rounded up.
func ceil(a, b int64) int64 { return (a + b - 1) / b }
