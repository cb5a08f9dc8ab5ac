package fill_test

import "time"

type permanent struct{ error }

func (p permanent) Unwrap() error              { return p.error }
func (permanent) Retry() (time.Duration, bool) { return 0, false }
