package backing
