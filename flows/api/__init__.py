"""A line and its versions as Python objects, for `import restitch`.

It stands above the other flows and imports them; nothing imports it.
"""
