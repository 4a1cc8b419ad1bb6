//! Reading the configuration again, at SIGHUP or at a request.

use crate::command_path::ControlPlane;
use crate::command_path::channel::Channel;
use crate::command_path::command_file::{CommandFileError, apply_startup_commands};
use crate::config::{Config, ConfigError, DaemonArgs, ShmSpec};

/// The reason the configuration stays as it was.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReloadError {
    /// The configuration is not valid.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The file of `--commands` is not valid.
    #[error(transparent)]
    Commands(#[from] CommandFileError),
    /// The commands cannot be enforced; the log has the reason.
    #[error("the commands cannot be enforced, see the log")]
    NotEnforced,
}

/// Reads the file of `--config` again, opens and closes regions as it says, and applies the file of
/// `--commands`.
///
/// # Errors
/// If anything is wrong; everything stays as it was then.
pub(crate) fn reload(
    args: &DaemonArgs,
    config: &mut Config,
    plane: &mut ControlPlane,
) -> Result<(), ReloadError> {
    log::info!("reading the configuration again");
    let new = args.resolve()?;
    let before = plane.desired.clone();
    let applied = apply_startup_commands(&mut plane.desired, new.commands.as_deref());
    if let Err(error) = applied {
        plane.desired = before;
        return Err(error.into());
    }
    plane.commit(before).map_err(|_| ReloadError::NotEnforced)?;
    plane.save();
    // The configuration takes precedence, as at the start.
    let is_other = |spec: &&ShmSpec| new.shm.iter().all(|its| its.path != spec.path);
    let attached: Vec<ShmSpec> = plane.attached.specs().filter(is_other).cloned().collect();
    let wanted: Vec<&ShmSpec> = new.shm.iter().chain(&attached).collect();
    let is_wanted =
        |channel: &Channel| channel.error().is_none() && wanted.contains(&channel.spec());
    plane.channels.retain(is_wanted);
    for spec in wanted {
        if plane.channels.iter().all(|channel| channel.spec() != spec) {
            plane.channels.push(Channel::open(spec));
        }
    }
    let reloadable =
        Config { shm: new.shm.clone(), commands: new.commands.clone(), ..config.clone() };
    if reloadable != new {
        log::warn!("shm and commands are in effect; the rest of the configuration needs a restart");
    }
    *config = reloadable;
    plane.warn_about_binding_violations();
    Ok(())
}
