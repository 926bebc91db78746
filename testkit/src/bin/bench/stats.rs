//! Distributions, and how they are printed.

/// Values in order.
#[derive(Clone, Debug, Default)]
pub struct Sorted(Vec<f64>);

impl Sorted {
    /// Sorts them.
    pub fn new(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        Self(values)
    }

    /// The value that so many of a hundred do not exceed; not a number if there are none.
    pub fn percentile(&self, of_hundred: usize) -> f64 {
        let last = self.0.len().saturating_sub(1);
        self.0.get((last * of_hundred + 50) / 100).copied().unwrap_or(f64::NAN)
    }

    /// The least.
    pub fn least(&self) -> f64 {
        self.percentile(0)
    }

    /// The median.
    pub fn median(&self) -> f64 {
        self.percentile(50)
    }

    /// The 99th percentile.
    pub fn p99(&self) -> f64 {
        self.percentile(99)
    }

    /// The greatest.
    pub fn greatest(&self) -> f64 {
        self.percentile(100)
    }

    /// Least, median and 99th percentile.
    pub fn three(&self, digits: usize) -> String {
        format!("{:.digits$} / {:.digits$} / {:.digits$}", self.least(), self.median(), self.p99())
    }
}

/// A word for a goal.
pub fn verdict(reached: bool) -> &'static str {
    if reached { "reached" } else { "missed" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_values_that_occurred() {
        let sorted = Sorted::new((1..=101).rev().map(f64::from).collect());
        assert_eq!(sorted.three(0), "1 / 51 / 100");
        assert!((sorted.greatest() - 101.0).abs() < f64::EPSILON);
        assert!(Sorted::default().median().is_nan());
    }
}
