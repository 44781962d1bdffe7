//! What a handful of repeated trials allows to say: spreads, a paired difference with an interval, and the share of a variance
//! that is due to one of two factors.

use serde::{Deserialize, Serialize};

/// Share of intervals that hold the truth.
const CONFIDENCE: f64 = 0.95;
/// Coefficients of Lanczos's approximation of the gamma function (g = 7, nine terms).
const LANCZOS: [f64; 9] = [
    0.999_999_999_999_809_9,
    676.520_368_121_885_1,
    -1_259.139_216_722_402_8,
    771.323_428_777_653_1,
    -176.615_029_162_140_6,
    12.507_343_278_686_905,
    -0.138_571_095_265_720_12,
    9.984_369_578_019_572e-6,
    1.505_632_735_149_311_6e-7,
];

/// The mean of values; `None` of none.
pub fn mean(values: &[f64]) -> Option<f64> {
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

/// The standard deviation of a sample; `None` of fewer than two values.
pub fn deviation(values: &[f64]) -> Option<f64> {
    variance(values).map(f64::sqrt)
}

fn variance(values: &[f64]) -> Option<f64> {
    let mean = mean(values).filter(|_| values.len() > 1)?;
    Some(values.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / (values.len() - 1) as f64)
}

/// How one method does against others in the same conditions.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Difference {
    /// Mean of the differences.
    pub mean: f64,
    /// The ends of the 95 % interval of that mean; `None` where one condition or one rival is too few to tell.
    pub interval: Option<(f64, f64)>,
    /// Pairs in which the method is the better one.
    pub better: usize,
    /// All pairs.
    pub pairs: usize,
}

impl Difference {
    /// Compares values of one method with those of rivals drawn at random, `rivals[r][c]` and `own[c]` in condition c; `None`
    /// where one is missing.
    ///
    /// Conditions and rivals are both samples of what there could be, so the mean of the differences has two errors: its
    /// variance is that of the means by condition over their number, plus that of the means by rival over theirs, and the
    /// degrees of freedom are Welch's and Satterthwaite's. The noise of single pairs counts in both, so the interval is rather
    /// too wide. Where pairs are missing it is an approximation.
    ///
    /// Returns `None` where there is no pair.
    pub fn of(own: &[Option<f64>], rivals: &[Vec<Option<f64>>]) -> Option<Self> {
        let pair = |rival: &[Option<f64>], c: usize| Some((*own.get(c)?)? - (*rival.get(c)?)?);
        let of_rival = |rival: &Vec<Option<f64>>| (0..own.len()).filter_map(|c| pair(rival, c)).collect::<Vec<_>>();
        let of_condition = |c: usize| rivals.iter().filter_map(|rival| pair(rival, c)).collect::<Vec<_>>();
        let all: Vec<f64> = rivals.iter().flat_map(of_rival).collect();
        let middle = mean(&all)?;
        let by_rival: Vec<f64> = rivals.iter().filter_map(|rival| mean(&of_rival(rival))).collect();
        let by_condition: Vec<f64> = (0..own.len()).filter_map(|c| mean(&of_condition(c))).collect();
        let part = |means: &[f64]| Some((variance(means)? / means.len() as f64, (means.len() - 1) as f64));
        let interval = part(&by_rival).zip(part(&by_condition)).map(|((a, free_a), (b, free_b))| {
            let all = a + b;
            // Without any spread there is nothing to be free in.
            let free = if all > 0.0 { all * all / (a * a / free_a + b * b / free_b) } else { 1.0 };
            let half = student_quantile(free) * all.sqrt();
            (middle - half, middle + half)
        });
        let better = all.iter().filter(|difference| **difference > 0.0).count();
        Some(Self { mean: middle, interval, better, pairs: all.len() })
    }
}

/// The share of the variance of `values[r][c]` that lies between rows and not within them: (MS_b − MS_w) / (MS_b + (n − 1)·MS_w),
/// the intraclass correlation of one-way analysis of variance, at 0 at least. 0: rows differ as their own values do; 1: by
/// nothing else. Rows must be equally long; `None` for fewer than two rows or columns, or values without any spread.
pub fn variance_share(rows: &[Vec<f64>]) -> Option<f64> {
    let columns = rows.first()?.len();
    if rows.len() < 2 || columns < 2 || rows.iter().any(|row| row.len() != columns) {
        return None;
    }
    let means: Vec<f64> = rows.iter().filter_map(|row| mean(row)).collect();
    let between = columns as f64 * variance(&means)?;
    let within = rows.iter().filter_map(|row| variance(row)).sum::<f64>() / rows.len() as f64;
    let whole = between + (columns - 1) as f64 * within;
    (whole > 0.0).then(|| ((between - within) / whole).max(0.0))
}

/// The factor of Student's distribution with `free` degrees of freedom, 1 or more, for a 95 % interval.
pub fn student_quantile(free: f64) -> f64 {
    let (mut low, mut high) = (0.0, 1e3);
    for _ in 0..100 {
        let middle = 0.5 * (low + high);
        if inside(middle, free) < CONFIDENCE { low = middle } else { high = middle }
    }
    0.5 * (low + high)
}

/// The probability that Student's t is within −t to t.
fn inside(t: f64, free: f64) -> f64 {
    1.0 - incomplete_beta(free / (free + t * t), 0.5 * free, 0.5)
}

/// The regularised incomplete beta function, by its continued fraction.
fn incomplete_beta(x: f64, a: f64, b: f64) -> f64 {
    if x <= 0.0 || x >= 1.0 {
        return x.clamp(0.0, 1.0);
    }
    if x > (a + 1.0) / (a + b + 2.0) {
        return 1.0 - incomplete_beta(1.0 - x, b, a);
    }
    let front = (ln_gamma(a + b) - ln_gamma(a) - ln_gamma(b) + a * x.ln() + b * (1.0 - x).ln()).exp() / a;
    // From the end, which needs no test for convergence: two hundred levels are far more than it takes here.
    let mut fraction = 1.0;
    for m in (1..=200).rev().map(f64::from) {
        let even = m * (b - m) * x / ((a + 2.0 * m - 1.0) * (a + 2.0 * m));
        let odd = -(a + m - 1.0) * (a + b + m - 1.0) * x / ((a + 2.0 * m - 2.0) * (a + 2.0 * m - 1.0));
        fraction = 1.0 + odd / (1.0 + even / fraction);
    }
    front / fraction
}

fn ln_gamma(x: f64) -> f64 {
    let shifted = x + 6.5;
    let terms = LANCZOS[1..].iter().enumerate().map(|(i, c)| c / (x + i as f64));
    let sum = LANCZOS[0] + terms.sum::<f64>();
    0.5 * (2.0 * std::f64::consts::PI).ln() + (x - 0.5) * shifted.ln() - shifted + sum.ln()
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;
    use rand_distr::{Distribution, StandardNormal};

    use super::*;

    #[test]
    fn quantiles_are_those_of_the_tables() {
        let table = [(1.0, 12.7062), (2.0, 4.30265), (3.0, 3.18245), (5.0, 2.57058), (10.0, 2.22814), (30.0, 2.04227)];
        for (free, expected) in table.into_iter().chain([(120.0, 1.97993), (1e5, 1.95998)]) {
            let got = student_quantile(free);
            assert!((got - expected).abs() < 1e-4, "{free}: {got} and {expected}");
        }
    }

    #[test]
    fn by_hand() {
        assert_eq!((mean(&[]), deviation(&[3.0])), (None, None));
        assert_eq!((mean(&[1.0, 2.0, 6.0]), deviation(&[1.0, 3.0])), (Some(3.0), Some(2f64.sqrt())));
        // Rows 1, 3 and 5, 9: means 2 and 7, so 25 between; 2 and 8 within, so 5.
        assert_eq!(variance_share(&[vec![1.0, 3.0], vec![5.0, 9.0]]), Some(20.0 / 30.0));
        assert_eq!(variance_share(&[vec![1.0, 3.0], vec![3.0, 1.0]]), Some(0.0));
        assert_eq!(variance_share(&[vec![1.0, 1.0], vec![2.0, 2.0]]), Some(1.0));
        for rows in [vec![vec![1.0, 2.0]], vec![vec![1.0], vec![2.0]], vec![vec![1.0; 2]; 2], vec![]] {
            assert_eq!(variance_share(&rows), None, "{rows:?}");
        }
        // Differences 1, 3 and 2, 6: means by rival 2 and 4, by condition 1.5 and 4.5; variances 2 / 2 and 4.5 / 2.
        let rivals = [vec![Some(9.0), Some(7.0)], vec![Some(8.0), Some(4.0)]];
        let found = Difference::of(&[Some(10.0), Some(10.0)], &rivals).unwrap();
        let (a, b) = (1.0, 2.25);
        let half = student_quantile((a + b) * (a + b) / (a * a + b * b)) * f64::sqrt(a + b);
        let (low, high) = found.interval.unwrap();
        assert_eq!((found.mean, found.better, found.pairs), (3.0, 4, 4));
        assert!((low - (3.0 - half)).abs() < 1e-9 && (high - (3.0 + half)).abs() < 1e-9);
        // What is missing is left out; one rival gives no interval.
        let few = Difference::of(&[Some(10.0), None], &[vec![Some(11.0), Some(1.0)], vec![None, Some(1.0)]]).unwrap();
        assert_eq!(few, Difference { mean: -1.0, interval: None, better: 0, pairs: 1 });
        assert_eq!(Difference::of(&[None], &rivals), None);
    }

    /// Intervals hold the true difference about as often as they say, whichever of the two errors is the larger one.
    #[test]
    fn intervals_cover() {
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        let mut normal = |size: f64| {
            let z: f64 = StandardNormal.sample(&mut rng);
            size * z
        };
        for (masks, seeds, of_mask, of_seed, noise) in
            [(8, 3, 1.3, 0.5, 0.6), (8, 5, 0.1, 1.0, 0.7), (4, 3, 1.0, 0.1, 0.1), (10, 10, 0.0, 0.0, 1.0)]
        {
            let (runs, mut held) = (1000, 0);
            for _ in 0..runs {
                let shared: Vec<f64> = (0..seeds).map(|_| normal(of_seed)).collect();
                let own: Vec<_> = shared.iter().map(|shared| Some(2.0 + shared + normal(noise))).collect();
                let rivals: Vec<Vec<_>> = (0..masks)
                    .map(|_| {
                        let own = normal(of_mask);
                        shared.iter().map(|shared| Some(own + shared + normal(noise))).collect()
                    })
                    .collect();
                let (low, high) = Difference::of(&own, &rivals).unwrap().interval.unwrap();
                held += i32::from((low..high).contains(&2.0));
            }
            let share = f64::from(held) / f64::from(runs);
            assert!((0.93..0.998).contains(&share), "{masks} masks, {seeds} seeds: {share}");
        }
    }
}
