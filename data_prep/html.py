"""Pages of one HTML file, with nothing to fetch: the frame and the style that all pages of the project share."""

from __future__ import annotations

from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined


def render(template: str, package: str = "data_prep", *, nonce: str = "", **values: Any) -> str:
    """A page from a template of a package's folder `templates/`, which may extend `base.html.jinja` of this one.

    Every value is escaped. The page's own policy forbids the browser to fetch anything, and to run any script.

    Args:
        nonce: marks the page's own scripts, which may then run.
        values: `title`, `sections` (pairs of an anchor and a name, for the navigation) and what the template asks for.
    """
    loader = ChoiceLoader([PackageLoader(package), PackageLoader("data_prep")])
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(template).render(nonce=nonce, **values)
