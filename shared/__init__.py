"""Code that more than one service needs: one module or folder per duty."""
