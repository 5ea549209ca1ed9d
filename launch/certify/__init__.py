"""zerobert certify: kills, resumes, and the comparison with an undisturbed run."""
