"""The obstacle matrix: ordinary training code on which curvature tools crash, or are silently wrong."""
