"""Teachers behind one interface: what they are, and what they say about a batch."""
