"""The proof that modules emerge: what is measured of a trained model, and the comparison of many."""
