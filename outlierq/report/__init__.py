"""The same report for people and programs: terminal tables here, JSON in `core.report`."""
