"""
Text: the E2E task from files to predictions, its scores, the generated corpus, the demo.

Stands on `jobs` and `training/`. Import what you need from its modules: the scores need no torch, the task does.
"""
