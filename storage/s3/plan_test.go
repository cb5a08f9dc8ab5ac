package s3

import (
	"testing"
)

func TestPartPlan(t *testing.T) {
	const kib, mib, gib, tib = 1 << 10, 1 << 20, 1 << 30, 1 << 40
	standard := limits{putLimit: 64 * mib, partSize: 16 * mib, maxParts: 10_000}
	few := limits{putLimit: 64 * mib, partSize: 16 * mib, maxParts: 200}
	for _, c := range []struct {
		name   string
		size   int64
		limits limits
		part   int64
		count  int
		fails  bool
	}{
		{name: "nothing", size: 0, limits: standard},
		{name: "one byte", size: 1, limits: standard},
		{name: "put_limit", size: 64 * mib, limits: standard},
		{name: "a byte more", size: 64*mib + 1, limits: standard, part: 16 * mib, count: 5},
		{name: "whole parts", size: 160 * mib, limits: standard, part: 16 * mib, count: 10},
		{name: "all parts used", size: 10_000 * 16 * mib, limits: standard, part: 16 * mib, count: 10_000},
		{name: "a byte more than all parts", size: 10_000*16*mib + 1, limits: standard, part: 17 * mib, count: 9412},
		{name: "1 TiB", size: tib, limits: standard, part: 105 * mib, count: 9987},
		{name: "5 TiB", size: 5 * tib, limits: standard, part: 525 * mib, count: 9987},
		{name: "more than 5 TiB", size: 5*tib + 1, limits: standard, fails: true},
		{name: "200 parts used", size: 200 * 16 * mib, limits: few, part: 16 * mib, count: 200},
		{name: "a byte more than 200 parts", size: 200*16*mib + 1, limits: few, part: 17 * mib, count: 189},
		{name: "a large layer in 200 parts", size: 8 * gib, limits: few, part: 41 * mib, count: 200},
		{name: "the most of 200 parts", size: 200 * 5 * gib, limits: few, part: 5 * gib, count: 200},
		{name: "more than 200 parts hold", size: 200*5*gib + 1, limits: few, fails: true},
		{name: "one part", size: 6 * gib, limits: limits{5 * gib, 16 * mib, 1}, fails: true},
		{name: "small parts", size: 11 * mib, limits: limits{5 * mib, 5 * mib, 10_000}, part: 5 * mib, count: 3},
		{name: "parts too small", size: 11 * mib, limits: limits{5 * mib, mib, 10_000}, part: 5 * mib, count: 3},
		{name: "no whole MiB", size: 100 * mib, limits: limits{5 * mib, 10*mib + 7*kib, 10_000}, part: 11 * mib, count: 10},
		{name: "more parts than S3 has", size: 5 * tib, limits: limits{64 * mib, 5 * mib, 100_000}, part: 525 * mib, count: 9987},
		{name: "put_limit beyond what S3 has", size: 5*gib + 1, limits: limits{10 * gib, gib, 10_000}, part: gib, count: 6},
	} {
		part, count, err := partPlan(c.size, c.limits)
		if part != c.part || count != c.count || (err != nil) != c.fails {
			t.Errorf("%s: %d parts of %d, %v; want %d of %d, an error: %v", c.name, count, part, err, c.count, c.part, c.fails)
		}
	}
}

func FuzzPartPlan(f *testing.F) {
	f.Add(int64(64<<20+1), int64(64<<20), int64(16<<20), 10_000)
	f.Add(int64(5<<40), int64(5<<20), int64(5<<20), 200)
	f.Add(int64(8<<30), int64(5<<20), int64(5<<30), 1)
	f.Fuzz(func(t *testing.T, size, putLimit, partSize int64, maxParts int) {
		// What Provision lets pass.
		if size < 0 || putLimit < smallestPart || putLimit > largestPart || partSize < smallestPart || partSize > largestPart || maxParts < 1 || maxParts > mostParts {
			return
		}
		l := limits{putLimit, partSize, maxParts}
		part, count, err := partPlan(size, l)
		if err != nil {
			if size <= largestObject && ceil(size, largestPart) <= int64(maxParts) {
				t.Fatalf("%d bytes: %v", size, err)
			}
			return
		}
		if (count == 0) != (size <= putLimit) {
			t.Fatalf("%d bytes in %d parts", size, count)
		}
		if count == 0 {
			return
		}
		last := size - int64(count-1)*part
		if count > maxParts || last <= 0 || last > part {
			t.Fatalf("%d bytes in %d parts of %d, the last %d", size, count, part, last)
		}
		if part%(1<<20) != 0 || part < partSize || part < smallestPart || part > largestPart {
			t.Fatalf("%d bytes in parts of %d", size, part)
		}
		if smaller := part - 1<<20; smaller >= partSize && smaller >= smallestPart && ceil(size, smaller) <= int64(maxParts) {
			t.Fatalf("%d bytes in parts of %d, where %d would do", size, part, smaller)
		}
	})
}
