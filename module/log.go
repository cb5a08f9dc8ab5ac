package module

import (
	"slices"
	"sync/atomic"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// A logCore writes to the logger of whichever configuration runs. A state
// outlives configurations, and the writers of one that has gone are closed.
type logCore struct {
	current *atomic.Pointer[zap.Logger]
	fields  []zapcore.Field
}

func (c *logCore) core() zapcore.Core { return c.current.Load().Core() }

func (c *logCore) Enabled(level zapcore.Level) bool { return c.core().Enabled(level) }

func (c *logCore) With(fields []zapcore.Field) zapcore.Core {
	return &logCore{c.current, append(slices.Clip(c.fields), fields...)}
}

func (c *logCore) Check(entry zapcore.Entry, checked *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(entry.Level) {
		return checked.AddCore(entry, c)
	}
	return checked
}

func (c *logCore) Write(entry zapcore.Entry, fields []zapcore.Field) error {
	if checked := c.core().Check(entry, nil); checked != nil {
		checked.Write(append(slices.Clip(c.fields), fields...)...)
	}
	return nil
}

func (c *logCore) Sync() error { return c.core().Sync() }
