"""How good a model is, by measures that need no other network:

metrics   retrieval among training pictures, and PSNR
runs      a run measured by the pictures that it draws
"""
