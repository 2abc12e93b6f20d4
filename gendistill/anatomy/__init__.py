"""What models are made of: families, geometry, mixers, placements, groups, costs. Imports no torch."""
