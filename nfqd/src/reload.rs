//! Reading the configuration again, at SIGHUP or at a request.

use crate::command_path::ControlPlane;
use crate::command_path::channel::Channel;
use crate::command_path::command_file::{CommandFileError, apply_startup_commands};
use crate::config::{ChannelSpec, Config, ConfigError, DaemonArgs};

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
    let is_other =
        |spec: &&ChannelSpec| new.channels.iter().all(|its| its.transport != spec.transport);
    let attached: Vec<ChannelSpec> = plane.attached.specs().filter(is_other).cloned().collect();
    let wanted: Vec<&ChannelSpec> = new.channels.iter().chain(&attached).collect();
    plane.configured = new.channels.iter().map(|spec| spec.transport.clone()).collect();
    plane.channels.retain_mut(|channel| {
        let spec = wanted.iter().find(|its| its.transport == channel.spec().transport);
        match spec {
            Some(spec) => channel.rebind(spec),
            None => {
                channel.end();
                false
            }
        }
    });
    for spec in wanted {
        if plane.channels.iter().all(|channel| channel.spec() != spec) {
            plane.channels.push(Channel::open(spec, &plane.resources));
        }
    }
    let reloadable =
        Config { channels: new.channels.clone(), commands: new.commands.clone(), ..config.clone() };
    if reloadable != new {
        log::warn!(
            "channels and commands are in effect; the rest of the configuration needs a restart"
        );
    }
    *config = reloadable;
    plane.warn_about_binding_violations();
    Ok(())
}
