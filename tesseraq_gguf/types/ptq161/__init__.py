"""PTQ1_61: salient columns of 4 bits, signs for the rest."""
