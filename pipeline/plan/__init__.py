"""Steps, the plan that they form, and a job's view of one step."""
