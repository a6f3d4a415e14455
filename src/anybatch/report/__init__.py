"""One self-contained HTML page: jinja2 and inline SVG. Imports errors and files."""
