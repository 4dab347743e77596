"""A live application on the CPU: a text or an image, a dial for the active heads, and what it costs beside the dense model.

What is computed is in `subjects`, `texts` and `images`, which need no Gradio; the application is in `interface` (extra `app`).
"""
