"""The parameter server over HTTP: REST, dashboard and metrics (docs/operate.md, docs/metrics.md)."""
