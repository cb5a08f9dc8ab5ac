package module

// CloseCatalogs closes the database of every store that is open, behind the back
// of whoever uses it, and returns how many those were.
func CloseCatalogs() (closed int) {
	states.Range(func(_, value any) bool {
		if o := value.(*state).works.Load(); o != nil {
			if c, err := o.keeper.Catalog(); err == nil {
				c.Close()
				closed++
			}
		}
		return true
	})
	return closed
}
