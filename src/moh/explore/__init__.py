"""A live application on the CPU: a text or an image, a dial for the active heads, and the cost against the dense model.

`subjects`, `texts` and `images` compute and need no Gradio; `interface` is the application (extra `app`).
"""
