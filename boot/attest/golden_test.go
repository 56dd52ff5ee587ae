package attest_test

// goldenQuote is a quote of PCRs 11 and 15 by swtpm 0.7.1, as TPMGetSignedMeasurements carries it.
const goldenQuote = ""
