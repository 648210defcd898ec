"""How processes reach each other: sessions with workers, links between servers, the collective that moves data."""
