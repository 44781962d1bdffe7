//! Methods side by side, from trials of methods × budgets × seeds: their spread, their difference to random masks, and how
//! much of what random masks differ by is due to the mask at all.

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::curves::MetricsLine;
use super::result::{NetworkStage, RunResult};
use super::table::{Align, Table};
use super::text::MISSING;
use super::trial_page::page;
use crate::measure::{Difference, deviation, mean, variance_share};

/// Version of the layout of [`TrialFile`]; it rises when a field changes its meaning or goes.
pub const TRIAL_SCHEMA: u32 = 1;
/// The method that others are compared with.
pub(super) const RANDOM: &str = "random";

/// What a trial is of. Written, it is the name of its folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrialName {
    /// How blocks were chosen.
    pub method: String,
    /// What the merged network may take.
    pub budget: String,
    /// Seed of choice and finetuning.
    pub seed: u64,
    /// Which random mask; absent for other methods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mask: Option<u64>,
}

impl fmt::Display for TrialName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { method, budget, seed, mask } = self;
        let mask = mask.map_or_else(String::new, |mask| format!("-{mask}"));
        write!(f, "{}-{method}{mask}-seed-{seed}", budget.replace([' ', '_'], "-"))
    }
}

/// A score during finetuning.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct RecoveryPoint {
    /// Steps of finetuning.
    pub step: u64,
    /// Accuracy on the test images, percent.
    pub top1: f64,
    /// Mean cross-entropy on the test images.
    pub loss: f64,
}

/// One finished trial: a row of `methods.csv`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Trial {
    /// Its number in the list of jobs.
    pub job: usize,
    /// What it is of.
    #[serde(flatten)]
    pub name: TrialName,
    /// Accuracy of the merged network on the test images, percent.
    pub top1: f64,
    /// Mean cross-entropy of it.
    pub loss: Option<f64>,
    /// Accuracy of the network that it was made from.
    pub original_top1: f64,
    /// Time by the latency table, as a share of the original's.
    pub latency_share: Option<f64>,
    /// Measured time as a share of the original's, where a budget was matched by the clock.
    pub measured_share: Option<f64>,
    /// How much more than the budget that is, as a share of the budget.
    pub budget_error: Option<f64>,
    /// Whether it is within the tolerance that was asked for.
    pub matches: Option<bool>,
    /// Measured milliseconds of one pass; 0 where nothing was measured.
    pub latency_ms: f64,
    /// Measured images/s over those of the original.
    pub speed_up: Option<f64>,
    /// Multiply-accumulates per image.
    pub macs: u64,
    /// Largest difference of a logit to the unmerged network, relative to the logits' scale.
    pub merge_error: Option<f64>,
    /// Seconds that the choice of blocks took.
    pub search_seconds: f64,
    /// Seconds of finetuning.
    pub finetune_seconds: f64,
    /// Seconds of all its stages.
    pub seconds: f64,
    /// One entry per block, 1 = its activations stayed.
    pub kept: Vec<u8>,
    /// Scores after steps and epochs of finetuning.
    pub recovery: Vec<RecoveryPoint>,
}

impl Trial {
    /// From what a run left.
    pub fn new(job: usize, name: TrialName, result: &RunResult, metrics: &[MetricsLine]) -> Self {
        let merged = result.network(NetworkStage::Merged);
        let seconds = |stage: &str| result.stages.iter().filter(|s| s.name == stage).map(|s| s.seconds).sum();
        let point = |line: &MetricsLine| {
            let finetuning = line.stage.as_deref() == Some("finetune");
            let (step, top1, loss) = (line.step?, line.test_top1?, line.test_loss?);
            finetuning.then_some(RecoveryPoint { step: step as u64, top1, loss })
        };
        let mut recovery: Vec<RecoveryPoint> = metrics.iter().filter_map(point).collect();
        // A step that was run twice, after a resume, counts as it was run last.
        recovery.reverse();
        recovery.sort_by_key(|point| point.step);
        recovery.dedup_by_key(|point| point.step);
        Self {
            job,
            name,
            top1: merged.map_or(f64::NAN, |network| network.top1),
            loss: merged.and_then(|network| network.loss),
            original_top1: result.network(NetworkStage::Original).map_or(f64::NAN, |network| network.top1),
            latency_share: result.latency_share,
            measured_share: result.matched.map(|matched| matched.share),
            budget_error: result.matched.map(|matched| matched.error()),
            matches: result.matched.map(|matched| matched.is_met()),
            latency_ms: merged.map_or(0.0, |network| network.latency_ms.median),
            speed_up: result.speed_up(NetworkStage::Merged),
            macs: merged.map_or(0, |network| network.macs),
            merge_error: result.merge.as_ref().map(|merge| merge.max_rel_error),
            search_seconds: seconds("search"),
            finetune_seconds: seconds("finetune"),
            seconds: result.stages.iter().map(|stage| stage.seconds).sum(),
            kept: result.kept.clone(),
            recovery,
        }
    }
}

/// Mean and standard deviation of a sample.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    /// Mean.
    pub mean: f64,
    /// Standard deviation; null of one value.
    pub deviation: Option<f64>,
}

impl Spread {
    fn of(values: impl Iterator<Item = Option<f64>>) -> Option<Self> {
        let values: Vec<f64> = values.flatten().collect();
        mean(&values).map(|mean| Self { mean, deviation: deviation(&values) })
    }
}

/// A method at a budget.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MethodSummary {
    /// What the merged networks may take.
    pub budget: String,
    /// How blocks were chosen.
    pub method: String,
    /// Finished trials.
    pub trials: usize,
    /// Accuracy, over seeds and, for random masks, over masks.
    pub top1: Option<Spread>,
    /// Test loss likewise.
    pub loss: Option<Spread>,
    /// Time by the latency table as a share of the original's.
    pub latency_share: Option<Spread>,
    /// Measured time likewise, where budgets were matched by the clock.
    pub measured_share: Option<Spread>,
    /// Trials that match their budget within the tolerance; null where no budget was matched.
    pub matching: Option<usize>,
    /// The largest difference of a trial to its budget, as a share of the budget.
    pub largest_budget_error: Option<f64>,
    /// Measured speed-up.
    pub speed_up: Option<Spread>,
    /// Accuracy over that of random masks with the same seed, points.
    pub top1_over_random: Option<Difference>,
    /// Test loss below that of random masks with the same seed.
    pub loss_under_random: Option<Difference>,
    /// Mean scores after steps of finetuning that all trials have.
    pub recovery: Vec<RecoveryPoint>,
    /// Share of the trials that kept each block.
    pub kept: Vec<f64>,
    /// Whether no other row of any budget is as fast or faster, and better.
    pub on_front: bool,
}

impl MethodSummary {
    /// Time as a share of the original's: measured where budgets were matched by the clock, else by the latency table.
    pub fn share(&self) -> Option<Spread> {
        self.measured_share.or(self.latency_share)
    }

    /// How many trials match their budget by the clock, and how far the farthest is where not all do.
    fn matched_text(&self) -> String {
        match (self.matching, self.largest_budget_error) {
            (Some(matching), Some(_)) if matching == self.trials => format!("{matching} of {matching}"),
            (Some(matching), Some(error)) => format!("{matching} of {}, {:+.1} %", self.trials, 100.0 * error),
            _ => MISSING.to_owned(),
        }
    }
}

/// What random masks at a budget say of the experiment.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct BudgetSummary {
    /// What the merged networks may take.
    pub budget: String,
    /// Random masks that all seeds have.
    pub masks: usize,
    /// Seeds.
    pub seeds: usize,
    /// Share of the variance of the accuracy that is due to the mask; the rest is due to the seed.
    pub top1_mask_share: Option<f64>,
    /// The same of the test loss.
    pub loss_mask_share: Option<f64>,
}

/// A row of `recovery.csv`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RecoveryRow<'a> {
    /// The trial's number in the list of jobs.
    pub job: usize,
    /// What it is of.
    #[serde(flatten)]
    pub name: &'a TrialName,
    /// What it had reached.
    #[serde(flatten)]
    pub point: RecoveryPoint,
}

/// `methods.json`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TrialFile<'a> {
    /// [`TRIAL_SCHEMA`].
    pub schema: u32,
    /// Version of this program.
    pub version: &'static str,
    /// Jobs of the comparison, finished or not.
    pub jobs: usize,
    /// Steps of finetuning after which scores were asked for.
    pub recovery_steps: &'a [u64],
    /// Methods by budget, in the order of the jobs.
    pub methods: Vec<MethodSummary>,
    /// Budgets.
    pub budgets: Vec<BudgetSummary>,
    /// The finished trials.
    pub trials: &'a [Trial],
}

impl<'a> TrialFile<'a> {
    /// Puts trials together, `jobs` being how many there will be, whose scores were asked for after some steps.
    pub fn new(jobs: usize, recovery_steps: &'a [u64], trials: &'a [Trial]) -> Self {
        let budgets = distinct(trials.iter().map(|trial| trial.name.budget.as_str()));
        let groups: Vec<Group<'_>> = budgets.into_iter().map(|budget| Group::new(trials, budget)).collect();
        Self {
            schema: TRIAL_SCHEMA,
            version: env!("CARGO_PKG_VERSION"),
            jobs,
            recovery_steps,
            methods: with_front(groups.iter().flat_map(Group::methods).collect()),
            budgets: groups.iter().map(Group::summary).collect(),
            trials,
        }
    }

    /// One row for each method and budget.
    pub fn table(&self) -> Table {
        use Align::{Left, Right};
        let mut header = vec![("budget", Left), ("method", Left)];
        let matched = self.methods.iter().any(|row| row.matching.is_some());
        header.extend(["trials", "top-1 %", "±", "loss", "±", "time %"].map(|name| (name, Right)));
        header.extend(if matched { &[("measured %", Right), ("matched", Right)][..] } else { &[] });
        header.push(("×", Right));
        header.extend(["over random", "95 %", "better"].map(|name| (name, Right)));
        let mut table = Table::new(&header);
        for row in &self.methods {
            let number = |value: Option<f64>, digits| {
                value.map_or_else(|| MISSING.to_owned(), |value| format!("{value:.digits$}"))
            };
            let middle = |spread: Option<Spread>, digits| number(spread.map(|spread| spread.mean), digits);
            let around = |spread: Option<Spread>, digits| number(spread.and_then(|spread| spread.deviation), digits);
            let percent = |share: Option<Spread>| share.map(|share| Spread { mean: 100.0 * share.mean, ..share });
            let mut cells = vec![row.budget.clone(), row.method.clone(), row.trials.to_string()];
            cells.extend([middle(row.top1, 2), around(row.top1, 2), middle(row.loss, 4), around(row.loss, 4)]);
            cells.push(middle(percent(row.latency_share), 1));
            if matched {
                cells.extend([middle(percent(row.measured_share), 1), row.matched_text()]);
            }
            cells.push(middle(row.speed_up, 2));
            cells.extend(match row.top1_over_random {
                None => [MISSING; 3].map(str::to_owned),
                Some(difference) => [
                    format!("{:+.2}", difference.mean),
                    difference
                        .interval
                        .map_or_else(|| MISSING.to_owned(), |(low, high)| format!("{low:+.2} to {high:+.2}")),
                    format!("{} of {}", difference.better, difference.pairs),
                ],
            });
            table.row(&cells);
        }
        table
    }

    /// What is to be said beside the table.
    pub fn notes(&self) -> Vec<String> {
        let mut notes = vec![format!("{} of {} jobs are finished", self.trials.len(), self.jobs)];
        for budget in &self.budgets {
            let share = |share: Option<f64>| share.map_or_else(|| MISSING.to_owned(), |share| format!("{share:.2}"));
            if budget.masks > 0 {
                notes.push(format!(
                    "{}: of what {} random masks × {} seeds differ by, the mask makes {} of the variance of top-1 and {} \
                     of that of the loss",
                    budget.budget,
                    budget.masks,
                    budget.seeds,
                    share(budget.top1_mask_share),
                    share(budget.loss_mask_share)
                ));
            }
        }
        for row in self.methods.iter().filter(|row| row.matching.is_some_and(|matching| matching < row.trials)) {
            notes.push(format!(
                "{}: nothing that {} selects comes near enough to the budget by the clock in {} of {} trials; the nearest \
                 were taken, the farthest of them {:+.1} % off",
                row.budget,
                row.method,
                row.trials - row.matching.unwrap_or(0),
                row.trials,
                100.0 * row.largest_budget_error.unwrap_or(0.0)
            ));
        }
        notes
    }

    /// `methods.html`: tables, notes, accuracy over time, recovery, and what was kept.
    pub fn page(&self) -> String {
        page(self)
    }

    /// The steps that tables of recovery have a column for: those that were asked for, as far as all trials reach them, and the
    /// last.
    pub fn shown_steps(&self) -> Vec<u64> {
        let all: BTreeSet<u64> = self.methods.iter().flat_map(|row| &row.recovery).map(|point| point.step).collect();
        let last = all.last().copied();
        all.into_iter().filter(|step| self.recovery_steps.contains(step) || Some(*step) == last).collect()
    }

    /// Mean accuracies and losses after steps of finetuning, one row for each method and budget; each table with its name.
    pub fn recovery_tables(&self) -> [(&'static str, Table); 2] {
        let steps = self.shown_steps();
        let names: Vec<String> = steps.iter().map(u64::to_string).collect();
        let mut header = vec![("budget", Align::Left), ("method", Align::Left)];
        header.extend(names.iter().map(|name| (name.as_str(), Align::Right)));
        let table = |of: fn(&RecoveryPoint) -> f64, digits: usize| {
            let mut table = Table::new(&header);
            for row in &self.methods {
                let at = |step: &u64| row.recovery.iter().find(|point| point.step == *step);
                let cell =
                    |step| at(step).map_or_else(|| MISSING.to_owned(), |point| format!("{:.digits$}", of(point)));
                let cells: Vec<String> =
                    [row.budget.clone(), row.method.clone()].into_iter().chain(steps.iter().map(cell)).collect();
                table.row(&cells);
            }
            table
        };
        [
            ("top-1 % of the unmerged network after steps of finetuning", table(|point| point.top1, 2)),
            ("test loss of the unmerged network after steps of finetuning", table(|point| point.loss, 4)),
        ]
    }

    /// The rows of `recovery.csv`: one for each trial and step.
    pub fn recovery_rows(&self) -> Vec<RecoveryRow<'a>> {
        let rows = |trial: &'a Trial| {
            let row = |&point: &RecoveryPoint| RecoveryRow { job: trial.job, name: &trial.name, point };
            trial.recovery.iter().map(row)
        };
        self.trials.iter().flat_map(rows).collect()
    }
}

/// The trials at one budget.
struct Group<'a> {
    budget: &'a str,
    trials: Vec<&'a Trial>,
    seeds: Vec<u64>,
    masks: Vec<u64>,
}

impl<'a> Group<'a> {
    fn new(trials: &'a [Trial], budget: &'a str) -> Self {
        let trials: Vec<&Trial> = trials.iter().filter(|trial| trial.name.budget == budget).collect();
        let seeds: BTreeSet<u64> = trials.iter().map(|trial| trial.name.seed).collect();
        let masks: BTreeSet<u64> = trials.iter().filter_map(|trial| trial.name.mask).collect();
        Self { budget, trials, seeds: seeds.into_iter().collect(), masks: masks.into_iter().collect() }
    }

    /// A number of a method's trials, by seed.
    fn by_seed(&self, method: &str, mask: Option<u64>, of: fn(&Trial) -> Option<f64>) -> Vec<Option<f64>> {
        let is = |trial: &&&Trial, seed: u64| {
            trial.name.method == method && trial.name.mask == mask && trial.name.seed == seed
        };
        self.seeds.iter().map(|&seed| self.trials.iter().find(|trial| is(trial, seed)).and_then(|t| of(t))).collect()
    }

    /// The same of every random mask.
    fn random(&self, of: fn(&Trial) -> Option<f64>) -> Vec<Vec<Option<f64>>> {
        self.masks.iter().map(|&mask| self.by_seed(RANDOM, Some(mask), of)).collect()
    }

    fn over_random(&self, method: &str, of: fn(&Trial) -> Option<f64>) -> Option<Difference> {
        Difference::of(&self.by_seed(method, None, of), &self.random(of)).filter(|_| method != RANDOM)
    }

    fn methods(&self) -> Vec<MethodSummary> {
        let summary = |method: &str| {
            let own: Vec<&Trial> = self.trials.iter().copied().filter(|trial| trial.name.method == method).collect();
            let spread = |of: fn(&Trial) -> Option<f64>| Spread::of(own.iter().map(|trial| of(trial)));
            MethodSummary {
                budget: self.budget.to_owned(),
                method: method.to_owned(),
                trials: own.len(),
                top1: spread(|trial| Some(trial.top1)),
                loss: spread(|trial| trial.loss),
                latency_share: spread(|trial| trial.latency_share),
                measured_share: spread(|trial| trial.measured_share),
                matching: own
                    .iter()
                    .any(|trial| trial.matches.is_some())
                    .then(|| own.iter().filter(|trial| trial.matches == Some(true)).count()),
                largest_budget_error: own
                    .iter()
                    .filter_map(|trial| trial.budget_error)
                    .max_by(|a, b| a.abs().total_cmp(&b.abs())),
                speed_up: spread(|trial| trial.speed_up),
                top1_over_random: self.over_random(method, |trial| Some(trial.top1)),
                loss_under_random: self.over_random(method, |trial| trial.loss.map(|loss| -loss)),
                recovery: recovery(&own),
                kept: kept_shares(&own),
                on_front: false,
            }
        };
        distinct(self.trials.iter().map(|trial| trial.name.method.as_str())).into_iter().map(summary).collect()
    }

    fn summary(&self) -> BudgetSummary {
        let complete = |of: fn(&Trial) -> Option<f64>| -> Vec<Vec<f64>> {
            self.random(of).into_iter().filter_map(|row| row.into_iter().collect()).collect()
        };
        let (top1, loss) = (complete(|trial| Some(trial.top1)), complete(|trial| trial.loss));
        BudgetSummary {
            budget: self.budget.to_owned(),
            masks: top1.len(),
            seeds: self.seeds.len(),
            top1_mask_share: variance_share(&top1),
            loss_mask_share: variance_share(&loss),
        }
    }
}

/// Mean scores at the steps that all trials have.
fn recovery(trials: &[&Trial]) -> Vec<RecoveryPoint> {
    let Some((first, others)) = trials.split_first() else { return Vec::new() };
    let at = |trial: &Trial, step: u64| trial.recovery.iter().find(|point| point.step == step).copied();
    let point = |step: u64| {
        let points: Vec<RecoveryPoint> = trials.iter().filter_map(|trial| at(trial, step)).collect();
        let over = points.len() as f64;
        let sum = |of: fn(&RecoveryPoint) -> f64| points.iter().map(of).sum::<f64>() / over;
        RecoveryPoint { step, top1: sum(|point| point.top1), loss: sum(|point| point.loss) }
    };
    let common = |point: &&RecoveryPoint| others.iter().all(|trial| at(trial, point.step).is_some());
    first.recovery.iter().filter(common).map(|shared| point(shared.step)).collect()
}

/// The share of trials that kept each block.
fn kept_shares(trials: &[&Trial]) -> Vec<f64> {
    let blocks = trials.iter().map(|trial| trial.kept.len()).min().unwrap_or(0);
    let share = |block: usize| {
        let kept = trials.iter().filter(|trial| trial.kept[block] != 0).count();
        kept as f64 / trials.len() as f64
    };
    (0..blocks).map(share).collect()
}

/// Marks the rows that no other one beats in time and accuracy.
fn with_front(mut rows: Vec<MethodSummary>) -> Vec<MethodSummary> {
    let points: Vec<Option<(f64, f64)>> =
        rows.iter().map(|row| Some((row.share()?.mean, row.top1?.mean)).filter(|at| at.1.is_finite())).collect();
    for (row, point) in rows.iter_mut().zip(&points) {
        let beats = |other: (f64, f64), own: (f64, f64)| other.0 <= own.0 && other.1 >= own.1 && other != own;
        row.on_front = point.is_some_and(|own| !points.iter().flatten().any(|other| beats(*other, own)));
    }
    rows
}

/// Every value once, in the order of their first places.
fn distinct<'a>(values: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut found = Vec::new();
    for value in values {
        if !found.contains(&value) {
            found.push(value);
        }
    }
    found
}
