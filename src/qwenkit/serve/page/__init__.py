"""The web page at `/` and the route that turns a model's markdown into safe HTML.

`page.py` has the routes, `render.py` markdown to HTML, `worker.py` the process that renders; the rest is the page itself:
`index.html`, `page.css` and the scripts, put together into one document when it is first asked for.
"""
