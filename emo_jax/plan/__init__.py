"""Planning a run before chips are rented: a cost model of one step (`cost`), fitted on compiled programs (`calibration`), the
search over meshes (`search`), public runs to hold it against (`published`), and how strategies scale (`scaling`)."""
