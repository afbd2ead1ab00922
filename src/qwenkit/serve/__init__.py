"""HTTP around an engine: protocol types, the driver between engine thread and event loop, routes, and the web page."""
