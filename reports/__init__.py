"""Show what was found: one self-contained HTML page per study, made from records only."""
