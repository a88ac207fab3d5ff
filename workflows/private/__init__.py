"""Private parts of Ray and MLflow. They are used only here, each with the reason why no public function serves.

tests/workflows/private fails when an installed release changes one of them.
"""
