//! Solvers over tables of times and importances: positions and segments, the published tables, brute force on small
//! cases, budgets that are never exceeded, unusable tables, and the command.

mod brute_force;
mod budgets;
mod command;
mod defaults;
mod layers;
mod measured;
mod networks;
mod operators;
mod oracles;
mod positions;
mod providers;
mod rules;
mod sensitivity;
mod tables;
mod widths;

use libtest_mimic::{Arguments, Trial};

/// A test that fails by panicking.
fn trial(name: impl Into<String>, test: impl FnOnce() + Send + 'static) -> Trial {
    Trial::test(name, move || {
        test();
        Ok(())
    })
}

fn main() {
    let arguments = Arguments::from_args();
    let groups = [
        positions::trials(),
        oracles::trials(),
        brute_force::trials(),
        budgets::trials(),
        rules::trials(),
        tables::trials(),
        command::trials(),
        defaults::trials(),
        measured::trials(),
        sensitivity::trials(),
        providers::trials(),
        widths::trials(),
        operators::trials(),
        layers::trials(),
    ];
    libtest_mimic::run(&arguments, groups.into_iter().flatten().collect()).exit();
}
