"""Plug-ins for other libraries; each is imported by its own name, because each imports the library it plugs into."""
