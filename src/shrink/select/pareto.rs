//! The best path through a graph of states that takes no more than a given time: what every exact solver here comes
//! down to.
//!
//! For each state the paths from the start are kept as labels (time, value), those dropped that another one beats in
//! both. Times are added as they are, so that nothing is rounded to ticks and a budget is never exceeded. A Lagrangian
//! bound drops labels that no completion can make as good as a path that is known: without it the labels of a deep
//! network with measured times, no two of which are alike, would be too many.

/// A way from an earlier state.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Arc {
    /// The earlier state.
    pub from: usize,
    /// What it takes, not below 0.
    pub time: f64,
    /// What it is worth.
    pub value: f64,
}

/// States in topological order; the first is the start.
#[derive(Debug, Clone, PartialEq)]
pub struct States {
    /// The time that has passed at the start.
    pub start: f64,
    /// For each state the arcs that lead there; an arc comes from a state of a lower index.
    pub into: Vec<Vec<Arc>>,
    /// Where a path may end.
    pub ends: Vec<usize>,
}

/// A way from the start to an end.
#[derive(Debug, Clone, PartialEq)]
pub struct Path {
    /// State after state, where an arc leads and which of the arcs into that state it is.
    pub arcs: Vec<(usize, usize)>,
    /// The sum of times, in the order of the path.
    pub time: f64,
    /// The sum of values.
    pub value: f64,
}

/// Values are compared after rounding to this many parts of 1, as the published solvers do, so that the noise of sums
/// in another order decides nothing.
const VALUE_PARTS: f64 = 1e7;
/// How much less than the best known value a bound may be, for its own rounding.
const ROUNDING: f64 = 1e-12;

/// A path to a state that no other beats in both time and value.
#[derive(Debug, Clone, Copy)]
struct Label {
    time: f64,
    value: f64,
    /// Which arc it came by, and which label of that arc's state it goes on from.
    arc: usize,
    parent: usize,
}

/// For one multiplier, the best of value − multiplier·time from every state to an end.
#[derive(Debug, Clone)]
struct Relaxed {
    multiplier: f64,
    rest: Vec<f64>,
    /// The way that takes: for each state the next one and the arc into it.
    next: Vec<Option<(usize, usize)>>,
}

impl States {
    /// The path that takes the least time; of equals the one whose last arcs come first. `None` where no path ends.
    pub fn fastest(&self) -> Option<Path> {
        let mut best: Vec<Option<(f64, usize)>> = vec![None; self.into.len()];
        best[0] = Some((self.start, 0));
        for (state, arcs) in self.into.iter().enumerate().skip(1) {
            for (index, arc) in arcs.iter().enumerate() {
                let Some((before, _)) = best[arc.from] else { continue };
                if best[state].is_none_or(|(time, _)| before + arc.time < time) {
                    best[state] = Some((before + arc.time, index));
                }
            }
        }
        let reached = self.ends.iter().filter_map(|&end| Some((best[end]?.0, end)));
        let (_, mut state) = reached.min_by(|a, b| a.0.total_cmp(&b.0))?;
        let mut arcs = Vec::new();
        while state != 0 {
            let (_, index) = best[state]?;
            arcs.push((state, index));
            state = self.into[state][index].from;
        }
        arcs.reverse();
        Some(self.path(arcs))
    }

    /// The path of the highest value that takes no more than `budget`; of equal values the fastest. `None` where there
    /// is none.
    pub fn best_within(&self, budget: f64) -> Option<Path> {
        // A product with an infinite budget would be no number.
        let budget = budget.min(f64::MAX);
        let bounds = self.bounds(budget)?;
        let mut labels: Vec<Vec<Label>> = vec![Vec::new(); self.into.len()];
        labels[0] = vec![Label { time: self.start, value: 0.0, arc: 0, parent: 0 }];
        for (state, arcs) in self.into.iter().enumerate().skip(1) {
            let mut reached = Vec::new();
            for (index, arc) in arcs.iter().enumerate() {
                for (parent, label) in labels[arc.from].iter().enumerate() {
                    let (time, value) = (label.time + arc.time, label.value + arc.value);
                    if time > budget {
                        // The labels of a state are in the order of their times.
                        break;
                    }
                    if bounds.iter().all(|bound| bound.allows(state, time, value)) {
                        reached.push(Label { time, value, arc: index, parent });
                    }
                }
            }
            reached.sort_by(|a, b| a.time.total_cmp(&b.time).then(b.value.total_cmp(&a.value)));
            let mut highest = f64::NEG_INFINITY;
            reached.retain(|label| {
                let better = label.value > highest;
                highest = highest.max(label.value);
                better
            });
            labels[state] = reached;
        }
        self.follow(&labels)
    }

    /// The best label of all ends, and the way it came.
    fn follow(&self, labels: &[Vec<Label>]) -> Option<Path> {
        let rounded = |label: &Label| (label.value * VALUE_PARTS).round();
        let all = self.ends.iter().flat_map(|&end| (0..labels[end].len()).map(move |index| (end, index)));
        let (mut state, mut index) = all.reduce(|a, b| {
            let (first, second) = (&labels[a.0][a.1], &labels[b.0][b.1]);
            let order = rounded(second).total_cmp(&rounded(first)).then(first.time.total_cmp(&second.time));
            if order.is_gt() { b } else { a }
        })?;
        let mut arcs = Vec::new();
        while state != 0 {
            let label = labels[state][index];
            arcs.push((state, label.arc));
            (state, index) = (self.into[state][label.arc].from, label.parent);
        }
        arcs.reverse();
        Some(self.path(arcs))
    }

    /// A path with its sums, taken from the start on as those of labels are.
    fn path(&self, arcs: Vec<(usize, usize)>) -> Path {
        let (mut time, mut value) = (self.start, 0.0);
        for &(state, index) in &arcs {
            let arc = self.into[state][index];
            (time, value) = (time + arc.time, value + arc.value);
        }
        Path { arcs, time, value }
    }

    /// The relaxation for one multiplier, from the last state to the first.
    fn relaxed(&self, multiplier: f64) -> Relaxed {
        let states = self.into.len();
        let (mut rest, mut next) = (vec![f64::NEG_INFINITY; states], vec![None; states]);
        for &end in &self.ends {
            rest[end] = 0.0;
        }
        for state in (1..states).rev() {
            for (index, arc) in self.into[state].iter().enumerate() {
                let value = rest[state] + arc.value - multiplier * arc.time;
                if value > rest[arc.from] {
                    rest[arc.from] = value;
                    next[arc.from] = Some((state, index));
                }
            }
        }
        Relaxed { multiplier, rest, next }
    }

    /// The path that a relaxation takes.
    fn relaxed_path(&self, relaxed: &Relaxed) -> Path {
        let (mut arcs, mut state) = (Vec::new(), 0);
        while let Some((to, index)) = relaxed.next[state] {
            arcs.push((to, index));
            state = to;
        }
        self.path(arcs)
    }

    /// Bounds for a budget, from multipliers on both sides of the one at which the relaxed path changes from too slow
    /// to fast enough; `None` where no path is fast enough.
    fn bounds(&self, budget: f64) -> Option<Vec<Bound>> {
        let fastest = self.fastest().filter(|path| path.time <= budget)?;
        let mut known = fastest.value;
        let mut fits = |relaxed: &Relaxed| {
            let path = self.relaxed_path(relaxed);
            // Products that overflow leave no way to an end.
            let fits = path.time <= budget && relaxed.rest[0] > f64::NEG_INFINITY;
            if fits {
                known = known.max(path.value);
            }
            fits
        };
        let arcs = || self.into.iter().flatten();
        let largest = arcs().map(|arc| arc.value.abs()).fold(0.0, f64::max);
        let longest = arcs().map(|arc| arc.time).fold(0.0, f64::max);
        let mut used = vec![self.relaxed(0.0)];
        if !fits(&used[0]) {
            let (mut low, mut high) = (self.relaxed(0.0), self.relaxed(largest.max(1e-9) / longest.max(1e-9)));
            let mut doublings = 0;
            while !fits(&high) && doublings < 64 {
                let doubled = self.relaxed(2.0 * high.multiplier);
                low = std::mem::replace(&mut high, doubled);
                doublings += 1;
            }
            for halvings in 0..48 {
                let middle = self.relaxed((low.multiplier + high.multiplier) / 2.0);
                // A few from the way there, for the states that lie far from the average.
                if halvings < 6 {
                    used.push(middle.clone());
                }
                if fits(&middle) { high = middle } else { low = middle }
            }
            used.extend([low, high]);
        }
        let scale = largest * self.into.len() as f64;
        let bound = |relaxed: Relaxed| {
            let rounding = ROUNDING * (scale + relaxed.multiplier * budget);
            Bound { budget, least: known - 2.0 / VALUE_PARTS - rounding, relaxed }
        };
        Some(used.into_iter().map(bound).collect())
    }
}

/// What a label must reach so that it can still become as good as a known path.
#[derive(Debug, Clone)]
struct Bound {
    budget: f64,
    least: f64,
    relaxed: Relaxed,
}

impl Bound {
    /// Whether some completion might: for any multiplier m ≥ 0 a completion within the budget is worth at most
    /// m·(budget − time) + max (value − m·time).
    fn allows(&self, state: usize, time: f64, value: f64) -> bool {
        let Relaxed { multiplier, rest, .. } = &self.relaxed;
        value + multiplier * (self.budget - time) + rest[state] >= self.least
    }
}
