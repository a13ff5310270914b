"""A package, so that tests can share helpers: `from tests.helpers.engines import start_engine`."""
