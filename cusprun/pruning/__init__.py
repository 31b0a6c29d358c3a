"""The method: impacts, the rules that judge them, the plan, the refit and the rewrite."""
