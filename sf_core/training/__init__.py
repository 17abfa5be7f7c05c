"""Self Forcing, the training: roll out your own generations, learn from the whole clip (arXiv 2506.08009).

python -m sf_core train CONFIG.yaml
"""
