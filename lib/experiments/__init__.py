"""One run, one row: functions (settings, *, seed, scratch=None) -> dict, for `lib.sweeps.run_sweep`."""
