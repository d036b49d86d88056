"""What is asked, and what counts as right: problem files, answers, grading."""
