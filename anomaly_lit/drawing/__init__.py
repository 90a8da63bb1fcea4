"""What we draw: heat maps, outlines, panels, curves, and PNG files of them.

- `outline`: lines around regions
- `heat`: colours of anomaly maps
- `panels`: one image with everything known of it, and sheets of panels
- `curves`, `histogram`: a test's curves, its values and its scores
- `loss_curves`: losses of a training
- `samples`: images of a data set on one sheet
- `timeline`: scores of clips over time
- `axes`, `png`: what the above share
"""
