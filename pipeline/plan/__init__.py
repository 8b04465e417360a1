"""Steps, the plan that they make, and what a job of one sees."""
